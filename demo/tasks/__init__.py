"""Tasks with pictures, questions, truths and scores: one yardstick for calibration, fidelity, benchmarks and tests."""

from edgevl.tasks.cases import MAX_PIXELS, SPLITS, TASKS, Case, Task
from edgevl.tasks.evaluation import Answered, TaskResult, answer_cases, score_bundle, summarize
from edgevl.tasks.scoring import Score, character_error, edit_distance, iou, parse_box, wilson

__all__ = [
    "MAX_PIXELS",
    "SPLITS",
    "TASKS",
    "Answered",
    "Case",
    "Score",
    "Task",
    "TaskResult",
    "answer_cases",
    "character_error",
    "edit_distance",
    "iou",
    "parse_box",
    "score_bundle",
    "summarize",
    "wilson",
]

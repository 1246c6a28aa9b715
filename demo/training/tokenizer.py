"""A 512-entry byte-level BPE tokenizer with Qwen2's pre-tokenization and special-token names.

Only words of the prompts are merged: what is read from a picture stays (nearly) one token per character, so a model
of 6 million parameters need not learn to spell.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# The pattern of Qwen2's tokenizer.json.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
STARTS = ("What", "Where", "Which", "How", "Read", "List")
FOLLOWING = [
    "the",
    "text",
    "total",
    "items",
    "is",
    "are",
    "colour",
    "many",
    "circle",
    "circles",
    "square",
    "squares",
    "triangle",
    "triangles",
    "star",
    "stars",
    "red",
    "green",
    "blue",
    "yellow",
    "black",
    "purple",
    "way",
    "does",
    "move",
    "shape",
    "shapes",
    "picture",
    "both",
    "first",
    "second",
    "in",
    "You",
    "a",
    "helpful",
    "assistant",
]
WORDS = [*STARTS, *(" " + w for w in FOLLOWING)]
# Where merged word parts would otherwise take over: "),(" of the boxes, and "assistant" without its space.
EXTRA = [(")", ","), ("),", "("), ("s", "s"), ("a", "ss"), ("ass", "i"), ("assi", "s"), ("assis", "t")]
EXTRA += [("assist", "a"), ("assista", "n"), ("assistan", "t")]
VOCAB_SIZE = 512


def bytes_to_unicode() -> dict[int, str]:
    """The printable stand-ins of GPT-2's byte-level BPE."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    out, n = {}, 0
    for b in range(256):
        out[b] = chr(b) if b in keep else chr(256 + n)
        n += b not in keep
    return out


def build() -> Tokenizer:
    """The tokenizer, the same every time: ids do not change while weights are trained on."""
    stand_in = bytes_to_unicode()
    vocab = {u: i for i, u in enumerate(sorted(stand_in.values()))}
    merges: list[tuple[str, str]] = []

    def merge(a: str, b: str) -> None:
        if (a, b) not in merges:
            merges.append((a, b))
            vocab[a + b] = len(vocab)

    for w in WORDS:
        u = [stand_in[c] for c in w.encode()]
        for i in range(1, len(u)):
            merge("".join(u[:i]), u[i])
    for a, b in EXTRA:
        merge(a, b)
    t = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    t.normalizer = normalizers.NFC()  # type: ignore[assignment]
    t.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    t.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    t.post_processor = processors.ByteLevel(trim_offsets=False)  # type: ignore[assignment]
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    if t.get_vocab_size() > VOCAB_SIZE:
        raise ValueError(f"vocabulary: got {t.get_vocab_size()} entries, expected at most {VOCAB_SIZE}")
    return t

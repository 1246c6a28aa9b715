"""Prints what pip has to install for a peer, one requirement a line, for `make peers`.

python -m edgevl.benchmarks.peers.requirements PEER
"""

from __future__ import annotations

import sys

from edgevl.benchmarks.peers.worker import peer

if __name__ == "__main__":
    sys.stdout.write("\n".join(peer(sys.argv[1]).REQUIREMENTS) + "\n")

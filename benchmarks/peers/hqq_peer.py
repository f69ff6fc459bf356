"""Quantize a checkpoint with HQQ through transformers; run by the interpreter of its own environment.

    python benchmarks/peers/hqq_peer.py MODEL OUT --bits 4 --group-size 64

The last line printed is a JSON object: seconds of each phase, versions.
"""

from __future__ import annotations

from typing import Any

from on_load import parser, run


def main() -> None:
    """Quantize while loading, save; report the seconds of each."""
    arguments = parser(__doc__)
    arguments.add_argument("--bits", type=int, default=4)
    arguments.add_argument("--group-size", type=int, default=64)
    options = arguments.parse_args()

    def make_config() -> Any:
        from transformers import HqqConfig

        return HqqConfig(nbits=options.bits, group_size=options.group_size, axis=1)

    run(options, make_config, ("hqq", "transformers"))


if __name__ == "__main__":
    main()

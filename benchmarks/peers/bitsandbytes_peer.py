"""Quantize a checkpoint with bitsandbytes through transformers; run by the interpreter of its own environment.

    python benchmarks/peers/bitsandbytes_peer.py MODEL OUT --type nf4|fp4|int8 [--double-quant]

The last line printed is a JSON object: seconds of each phase, versions.
"""

from __future__ import annotations

from typing import Any

from on_load import parser, run


def main() -> None:
    """Quantize while loading, save; report the seconds of each."""
    arguments = parser(__doc__)
    arguments.add_argument("--type", choices=["nf4", "fp4", "int8"], default="nf4")
    arguments.add_argument("--double-quant", action="store_true")
    options = arguments.parse_args()

    def make_config() -> Any:
        from transformers import BitsAndBytesConfig

        if options.type == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=options.type, bnb_4bit_use_double_quant=options.double_quant
        )

    run(options, make_config, ("bitsandbytes", "torch"))


if __name__ == "__main__":
    main()

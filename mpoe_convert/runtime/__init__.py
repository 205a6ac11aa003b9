"""What ships with every artifact: `modeling_mpoe.py`, which needs torch and transformers only.

The file is built from the other modules of this folder, its parts (`python -m mpoe_convert.runtime.build`).
Read and edit the parts, and import `modeling_mpoe` alone: a part that is imported itself defines every class
a second time.
"""

from pathlib import Path

MODELING_PATH = Path(__file__).with_name("modeling_mpoe.py")
# What an artifact has as `custom_generate/generate.py`.
GENERATE_PATH = Path(__file__).with_name("generate.py")

"""What ships with every artifact: `modeling_mpoe.py`, which needs torch and transformers only."""

from pathlib import Path

MODELING_PATH = Path(__file__).with_name("modeling_mpoe.py")

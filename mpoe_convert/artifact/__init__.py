"""The folder that a conversion writes: its format, how it appears, and what is done with it whole."""

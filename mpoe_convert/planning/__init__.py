"""From a recipe and a checkpoint's headers to the resolved work."""

"""The loop: read, build, write, measure."""

"""What is read: checkpoints, their code, their FFNs, and texts."""

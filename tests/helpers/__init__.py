"""What several tests use: tiny models, pairs of models, data, a Hub on loopback."""

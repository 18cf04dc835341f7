"""Causal video diffusion: transformer, frame autoencoder, text tokens, checkpoints."""

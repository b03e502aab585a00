"""What no core module imports: other divergences, quality of samples, reading the latent space."""

"""The networks and their losses; each imports torch, and nothing here imports a training loop."""

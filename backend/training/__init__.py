"""The four training stages, from K-Hairstyle photos to a deployed model."""

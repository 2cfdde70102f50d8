"""What the photos and labels of K-Hairstyle say, read as they lie on disk (numpy and the standard library only)."""

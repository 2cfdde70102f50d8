"""Pure image work shared by training and serving: numpy and OpenCV, no torch.

Conventions: images are (H, W, 3) uint8 RGB; masks are (H, W) uint8 0 or 255 unless said otherwise; points are (x, y) in pixels of the
frame named, with pixel centres at half-integers left of the next pixel's edge (OpenCV's own convention: integer = pixel centre).
"""

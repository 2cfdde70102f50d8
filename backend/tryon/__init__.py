"""The product in one room: a target, a reference and a bundle become a picture.

The app serves it, evaluate.py judges it, train_stage2.py takes its conditioning and its preview pictures. What is evaluated is what
is served.
"""

"""The distortions by kind, each a pure function of a batch of images and of draws that belong to one image each."""

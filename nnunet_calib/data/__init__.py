"""What is on disk: images, nnU-Net folders, dataset.json and plans, probability files."""

"""The command ``nnunet-calib``: one module a verb; parses and prints, decides nothing."""

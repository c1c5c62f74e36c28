"""One module per paper, each with a function `study(lab)`."""

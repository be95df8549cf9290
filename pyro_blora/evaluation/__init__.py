"""What a method is worth: metrics, temperature, plots, plain LoRA, comparisons and their files."""

"""What a pretrained encoder and its rotation head have learned, in pictures and counts."""

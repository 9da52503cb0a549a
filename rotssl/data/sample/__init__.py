"""The embedded sample of Fashion-MNIST; see source.json."""

"""The laboratory: methods × tasks × seeds, each at the learning rate that suits it; and the demo."""

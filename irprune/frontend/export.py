"""``torch.export`` to :class:`Program`."""

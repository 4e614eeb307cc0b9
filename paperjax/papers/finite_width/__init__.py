"""Papers on what wide networks keep of their finite width."""

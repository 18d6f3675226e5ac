"""What an exported encoder is measured by. Nothing is exported yet: the artifact itself is deployed."""

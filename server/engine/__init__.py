"""The engine process: it owns the device and holds nothing durable."""

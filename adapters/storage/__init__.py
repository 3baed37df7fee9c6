"""Durable adapters: names, versions, files, local and remote stores."""

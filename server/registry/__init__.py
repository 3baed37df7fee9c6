"""The meaning of adapters' names: opening, publishing, pinning and discovering versions. API process."""

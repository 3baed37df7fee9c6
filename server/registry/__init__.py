"""What an adapter's name means: opening, publishing, pinning and discovering versions. API process."""

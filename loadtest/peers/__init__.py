"""The systems in a comparison, each behind the same small interface (`base.Side`)."""

"""The systems that a comparison measures, each behind the same small interface (`base.Side`)."""

"""From what a pipe is to what it shall be: snapshot, target, plan, records, transaction."""

"""What other trainers are told, as tables: each flag, and what becomes of it here."""

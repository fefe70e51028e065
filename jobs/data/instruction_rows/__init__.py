"""What make_instructions.py builds its rows from: tables, word forms and topics."""

"""What an answer is worth: functions, servers, models; penalties and normalisation."""

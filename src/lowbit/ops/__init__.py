"""What a team needs the day after: benchmark, watch, back up, deploy, grow past one machine."""

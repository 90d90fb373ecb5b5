"""Files as users have them: texts of any encoding in, whole files out, logs that survive a crash."""

"""What every program needs: settings files, logs, watchdog, sockets, watched files."""

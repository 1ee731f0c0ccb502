"""What everything else stands on and no equation needs: errors, files, options, processes. Imports only itself."""

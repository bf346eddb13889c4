#!/bin/sh
# HAProxy as Ray Serve starts it (-db -f CONFIG …), but with its two pages of statistics on loopback as all else:
# Ray's template binds them to all interfaces and leaves only their ports to choose. SRPO_HAPROXY is the real binary.
set -eu
sed -i -E 's/^( *bind )\*?:/\1127.0.0.1:/' "$3"
exec "$SRPO_HAPROXY" "$@"

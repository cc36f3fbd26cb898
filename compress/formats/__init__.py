"""One file per artifact kind: `KIND`, `VERSION`, `spec`, `pack`, `unpack`, in pure torch and exact on a CPU."""

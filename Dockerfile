# A postgres image with the extension:
#   docker build --build-arg PG_MAJOR=17 -t vod-tender-postgres .
# Both stages are Debian bookworm, so that the library finds the glibc that it was linked against.
ARG PG_MAJOR=17

FROM rust:1.95-bookworm AS rust

FROM postgres:${PG_MAJOR}-bookworm AS build
ARG PG_MAJOR
# The base image knows the package repository that its server came from.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential ca-certificates clang libclang-dev pkg-config "postgresql-server-dev-${PG_MAJOR}" \
    && rm -rf /var/lib/apt/lists/*
ENV RUSTUP_HOME=/usr/local/rustup \
    CARGO_HOME=/usr/local/cargo \
    PATH=/usr/local/cargo/bin:$PATH
COPY --from=rust /usr/local/rustup /usr/local/rustup
COPY --from=rust /usr/local/cargo /usr/local/cargo

# Before the sources, so that it is built once.
RUN cargo install cargo-pgrx --version 0.18.1 --locked \
    && cargo pgrx init "--pg${PG_MAJOR}=/usr/lib/postgresql/${PG_MAJOR}/bin/pg_config"

WORKDIR /build
COPY . .
RUN cargo pgrx package --pg-config "/usr/lib/postgresql/${PG_MAJOR}/bin/pg_config" --out-dir /out \
        --no-default-features --features "pg${PG_MAJOR}"

FROM postgres:${PG_MAJOR}-bookworm
# The TLS roots that calls to a key service are checked against.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
# The library, the control file and the extension's script, where this server looks for them.
COPY --from=build /out/ /

# The images of both services, a target each: `docker build --target api .`, `docker build --target stream-gateway .`.
# k8s/ and docker-compose.yml rely on this: the entry point is the binary, it runs as user 65532, needs no shell, writes nowhere,
# and finds public certificates in /etc/ssl/certs.
#
# BuildKit of Docker 20.10 suffices.

# By digest where builds must be reproducible, from a mirror where there is no internet.
ARG RUST=rust:1.95-bookworm
# libc, libgcc, certificates, time zones, and no shell. The same Debian as above, for the same libc.
ARG RUNTIME=gcr.io/distroless/cc-debian12:nonroot


# --- dependencies: built again only when a manifest or the lock file changes -------------------------------------------
FROM ${RUST} AS dependencies
WORKDIR /src
# No line tables, which are two thirds of a binary; the names of functions stay, for backtraces.
ENV CARGO_PROFILE_RELEASE_DEBUG=none \
    CARGO_INCREMENTAL=0 \
    SQLX_OFFLINE=true
COPY Cargo.toml Cargo.lock ./
COPY api/Cargo.toml api/
COPY benches/Cargo.toml benches/
COPY dev/Cargo.toml dev/
COPY e2e/Cargo.toml e2e/
COPY manifests/Cargo.toml manifests/
COPY shared/protocol/Cargo.toml shared/protocol/
COPY shared/service-kit/Cargo.toml shared/service-kit/
COPY shared/testkit/Cargo.toml shared/testkit/
COPY stream-gateway/Cargo.toml stream-gateway/
# The lock file needs every workspace member, so each is an empty library here. Our part of the build is deleted again: it is newer
# than the real sources and would replace them.
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    for member in */Cargo.toml shared/*/Cargo.toml; do mkdir "${member%Cargo.toml}src" && touch "${member%Cargo.toml}src/lib.rs" || exit; done \
    && cargo build --release --locked --package api --package stream-gateway \
    && cargo clean --release --locked --package protocol --package service-kit --package api --package stream-gateway


# --- ours --------------------------------------------------------------------------------------------------------------
# Both in one build: alone, each would build the dependencies with other features.
FROM dependencies AS build
COPY shared/protocol/src shared/protocol/src
COPY shared/service-kit/src shared/service-kit/src
COPY api api
COPY stream-gateway/src stream-gateway/src
COPY web web
# Fixed times: the same sources give the same layer.
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    cargo build --release --locked --package api --package stream-gateway \
    && install -D --target-directory=/out target/release/api target/release/stream-gateway \
    && touch --date=@0 /out/api /out/stream-gateway


# --- the images --------------------------------------------------------------------------------------------------------
FROM ${RUNTIME} AS stream-gateway
COPY --from=build /out/stream-gateway /usr/local/bin/stream-gateway
USER 65532:65532
# Streams; operators.
EXPOSE 8090 8092
# Liveness only: no container may be restarted because a dependency is away.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["/usr/local/bin/stream-gateway", "healthcheck", "livez"]
ENTRYPOINT ["/usr/local/bin/stream-gateway"]
# Last, so that a new revision makes no new layer.
ARG VERSION=dev
ARG REVISION=unknown
ARG SOURCE=
LABEL org.opencontainers.image.title="messenger/stream-gateway" \
      org.opencontainers.image.description="Holds the event streams of the messenger's browsers." \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"

FROM ${RUNTIME} AS api
COPY --from=build /out/api /usr/local/bin/api
USER 65532:65532
# REST; gateways; operators.
EXPOSE 8080 8081 8082
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["/usr/local/bin/api", "healthcheck", "livez"]
ENTRYPOINT ["/usr/local/bin/api"]
ARG VERSION=dev
ARG REVISION=unknown
ARG SOURCE=
LABEL org.opencontainers.image.title="messenger/api" \
      org.opencontainers.image.description="REST, the web client, and the messenger's only writer." \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"

//! A real OpenTelemetry collector and a receiver of what it exports, so that another program has parsed the spans.

use std::{
    collections::BTreeMap,
    io::Read,
    net::SocketAddr,
    process::{Command, Stdio},
    time::Duration,
};

use flate2::read::GzDecoder;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value},
    trace::v1::span::SpanKind,
};
use prost::Message;
use service_kit::server::{self, Limits, ServerMetrics};
use testkit::{ports::free_port, process::Process, programs, soon, until};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use warp::Filter;

/// A span that the collector exported. Ids are in hex, times in nanoseconds since 1970.
#[derive(Debug, Clone)]
pub struct ReceivedSpan {
    pub service: String,
    pub instance: String,
    pub name: String,
    pub kind: SpanKind,
    pub trace: String,
    pub id: String,
    pub parent: String,
    pub begin: u64,
    pub end: u64,
    pub failed: Option<String>,
    pub attributes: BTreeMap<String, String>,
}

impl ReceivedSpan {
    pub fn attribute(&self, key: &str) -> &str {
        self.attributes.get(key).unwrap_or_else(|| panic!("no {key} in {self:?}"))
    }
}

pub struct Collector {
    port: u16,
    seen: watch::Sender<Vec<ReceivedSpan>>,
    _process: Process,
    _folder: tempfile::TempDir,
    _stop: DropGuard,
}

impl Collector {
    pub async fn start() -> Self {
        let seen = watch::Sender::new(Vec::new());
        let (receiver, stop) = receive(seen.clone());
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (http, grpc) = (free_port(), free_port());
        let mut command =
            Command::new(programs::program("DEV_ROTEL", "an OpenTelemetry collector", "pip install rotel"));
        command
            .arg("start")
            .arg("--pid-file")
            .arg(folder.path().join("pid"))
            .arg("--log-file")
            .arg(folder.path().join("log"))
            .args(["--otlp-http-endpoint", &format!("127.0.0.1:{http}")])
            .args(["--otlp-grpc-endpoint", &format!("127.0.0.1:{grpc}")])
            .args(["--exporter", "otlp", "--otlp-exporter-protocol", "http"])
            .args(["--otlp-exporter-endpoint", &format!("http://{receiver}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let process = Process::start(&mut command).expect("the collector can be started");
        until("the collector takes connections", async || {
            tokio::net::TcpStream::connect(("127.0.0.1", http)).await.is_ok()
        })
        .await;
        Self { port: http, seen, _process: process, _folder: folder, _stop: stop }
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn trace(&self, trace: &str) -> Vec<ReceivedSpan> {
        of(trace, &self.seen.borrow())
    }

    pub async fn until(
        &self,
        what: &str,
        trace: &str,
        wanted: impl Fn(&[ReceivedSpan]) -> bool,
    ) -> Vec<ReceivedSpan> {
        let mut seen = self.seen.subscribe();
        let seen =
            soon(what, seen.wait_for(|seen| wanted(&of(trace, seen)))).await.expect("the receiver is ours");
        of(trace, &seen)
    }

    pub fn text(&self) -> String {
        format!("{:?}", self.seen.borrow())
    }
}

fn of(trace: &str, seen: &[ReceivedSpan]) -> Vec<ReceivedSpan> {
    seen.iter().filter(|span| span.trace == trace).cloned().collect()
}

fn receive(seen: watch::Sender<Vec<ReceivedSpan>>) -> (SocketAddr, DropGuard) {
    let listener = server::bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port of loopback");
    let address = listener.local_addr().expect("it is bound");
    let routes = warp::path!("v1" / "traces").and(warp::post()).and(warp::body::bytes()).map(
        move |body: warp::hyper::body::Bytes| {
            // It compresses regardless of its settings.
            let mut plain = Vec::new();
            GzDecoder::new(&*body).read_to_end(&mut plain).expect("the collector sends gzip");
            let request = ExportTraceServiceRequest::decode(&*plain).expect("the collector sends OTLP");
            seen.send_modify(|seen| seen.extend(read(request)));
            warp::reply()
        },
    );
    let stop = CancellationToken::new();
    let limits = Limits { stop: Duration::ZERO, ..Limits::default() };
    let metrics = ServerMetrics::default().listener("collector");
    tokio::spawn(server::serve(listener, warp::service(routes), limits, metrics, stop.clone()));
    (address, stop.drop_guard())
}

fn read(request: ExportTraceServiceRequest) -> Vec<ReceivedSpan> {
    let mut seen = Vec::new();
    for of_service in request.resource_spans {
        let resource = attributes(of_service.resource.unwrap_or_default().attributes);
        let text = |key: &str| resource.get(key).cloned().unwrap_or_default();
        for span in of_service.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            seen.push(ReceivedSpan {
                service: text("service.name"),
                instance: text("service.instance.id"),
                kind: span.kind(),
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                begin: span.start_time_unix_nano,
                end: span.end_time_unix_nano,
                failed: span.status.filter(|status| status.code == 2).map(|status| status.message),
                attributes: attributes(span.attributes),
                name: span.name,
            });
        }
    }
    seen
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attributes(pairs: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |value| match value {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    pairs.into_iter().map(|pair| (pair.key, text(pair.value.and_then(|value| value.value)))).collect()
}

//! Login providers for tests: two real ones (`tests/providers`, run by node), a fake one that does what a test wants, and a
//! browser that follows redirects between them and us.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use api::config::{ClientRegistration, ProviderSettings};
use serde_json::{Value, json};
use testkit::{
    http::{Answer, Client},
    node::NodeServer,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{ServerConfig, crypto::ring, pki_types::PrivateKeyDer},
};
use url::{Url, form_urlencoded};

use crate::support::ORIGIN;

pub(crate) const DISCOVERY: &str = "/.well-known/openid-configuration";
pub(crate) const CLIENT_ID: &str = "messenger";
pub(crate) const CLIENT_SECRET: &str = "the-client-secret-of-these-tests";

fn registration() -> ClientRegistration {
    ClientRegistration { client_id: CLIENT_ID.into(), client_secret: CLIENT_SECRET.into() }
}

pub(crate) fn github_at(url: &str) -> ProviderSettings {
    ProviderSettings::GitHub { url: url.into(), api_url: url.into(), registration: registration() }
}

pub(crate) fn oidc_at(issuer: &str) -> ProviderSettings {
    ProviderSettings::Oidc { issuer: issuer.into(), registration: registration() }
}

pub(crate) struct Providers {
    pub(crate) oidc: String,
    pub(crate) github: String,
    client: Client,
    _server: NodeServer,
}

impl Providers {
    pub(crate) fn start() -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/providers");
        let server = NodeServer::start(&folder, "providers.mjs", ORIGIN);
        let address = |name: &str| server.said[name].as_str().unwrap().to_owned();
        Self { oidc: address("oidc"), github: address("github"), client: Client::default(), _server: server }
    }

    pub(crate) fn both(&self) -> [ProviderSettings; 2] {
        [github_at(&self.github), oidc_at(&self.oidc)]
    }

    /// Name and picture of the account `id`, at both.
    pub(crate) async fn account(&self, id: &str, name: &str, avatar: &str) {
        let claims = json!({
            "preferred_username": name,
            "picture": avatar,
            "github": { "id": id.parse::<u64>().unwrap(), "login": name, "name": null, "avatar_url": avatar },
        });
        self.control(&format!("accounts/{id}"), &claims).await;
    }

    /// The GitHub-like one answers by forms, whatever format is requested.
    pub(crate) async fn answer_by_forms(&self) {
        self.control("form", &json!(true)).await;
    }

    async fn control(&self, what: &str, value: &Value) {
        let call = self.client.call("PUT", format!("{}/control/{what}", self.oidc));
        call.json(value).expect(204).await;
    }
}

#[derive(Default)]
pub(crate) struct LoginBrowser {
    client: Client,
    cookies: HashMap<String, Vec<SetCookie>>,
}

/// One of the same name keeps its place, as its age (RFC 6265, 5.3).
fn keep(jar: &mut Vec<SetCookie>, cookie: SetCookie) {
    match jar.iter_mut().find(|other| other.name == cookie.name) {
        Some(other) => *other = cookie,
        None => jar.push(cookie),
    }
}

impl LoginBrowser {
    pub(crate) async fn get(&mut self, app: &impl AsRef<str>, url: &Url) -> Answer {
        self.call(app, "GET", url, None).await
    }

    async fn call(&mut self, app: &impl AsRef<str>, method: &str, url: &Url, body: Option<&Value>) -> Answer {
        let ours = url.as_str().strip_prefix(ORIGIN);
        let address = ours.map_or_else(|| url.to_string(), |path| format!("{}{path}", app.as_ref()));
        let host = url[..url::Position::BeforePath].to_owned();
        let jar = self.cookies.entry(host).or_default();
        let sent: Vec<_> = jar
            .iter()
            .filter(|kept| url.path().starts_with(&kept.path))
            .map(|kept| format!("{}={}", kept.name, kept.value))
            .collect();
        let mut call = self.client.call(method, address);
        if !sent.is_empty() {
            call = call.header("cookie", &sent.join("; "));
        }
        if let Some(body) = body {
            call = call.json(body);
        }
        let answer = call.send().await.expect("an answer");
        for cookie in set_cookies(&answer) {
            if cookie.max_age == Some(0) || cookie.value.is_empty() {
                jar.retain(|kept| kept.name != cookie.name);
            } else {
                keep(jar, cookie);
            }
        }
        answer
    }

    /// Follows redirects from `url` to the last page, to our page, or until `until`.
    pub(crate) async fn follow(
        &mut self,
        app: &impl AsRef<str>,
        mut url: Url,
        until: impl Fn(&Url) -> bool,
    ) -> Url {
        for _ in 0..10 {
            if until(&url) || is_page(&url) {
                return url;
            }
            let answer = self.get(app, &url).await;
            assert!((300..400).contains(&answer.status), "{} {url}: {}", answer.status, answer.text());
            url = url.join(answer.header("location").unwrap()).unwrap();
        }
        panic!("redirect loop");
    }

    /// Up to our callback, which is not requested yet.
    pub(crate) async fn come_back(&mut self, app: &impl AsRef<str>, provider: &str, account: &str) -> Url {
        let start = ours(&format!("/api/oauth/{provider}"));
        let mut authorize = self.follow(app, start, |url| !url.as_str().starts_with(ORIGIN)).await;
        authorize.query_pairs_mut().append_pair("login_hint", account);
        self.follow(app, authorize, |url| url.as_str().starts_with(ORIGIN)).await
    }

    /// From our callback to our page.
    pub(crate) async fn finish(&mut self, app: &impl AsRef<str>, callback: Url) -> Url {
        self.follow(app, callback, is_page).await
    }

    pub(crate) async fn sign_in(&mut self, app: &impl AsRef<str>, provider: &str, account: &str) -> Url {
        let callback = self.come_back(app, provider, account).await;
        self.finish(app, callback).await
    }

    /// At the fake provider, with a code that is valid or not.
    pub(crate) async fn sign_in_at_fake(&mut self, app: &impl AsRef<str>, provider: &str) -> Url {
        let callback = begin(app, provider, self).await;
        self.finish(app, callback).await
    }

    pub(crate) async fn exchange(&mut self, app: &impl AsRef<str>, code: &str) -> Answer {
        self.call(app, "POST", &ours("/api/oauth/exchange"), Some(&json!({ "code": code }))).await
    }

    /// Names and values of our cookies of this kind, the oldest first.
    pub(crate) fn cookies(&self, kind: &str) -> Vec<(String, String)> {
        let ours = self.cookies.get(ORIGIN).into_iter().flatten();
        let of_kind = ours.filter(|kept| kept.name.starts_with(&format!("messenger_{kind}")));
        of_kind.map(|kept| (kept.name.clone(), kept.value.clone())).collect()
    }

    pub(crate) fn cookie(&self, kind: &str) -> Option<(String, String)> {
        self.cookies(kind).pop()
    }

    pub(crate) fn set_cookie(&mut self, name: &str, value: &str) {
        let jar = self.cookies.entry(ORIGIN.into()).or_default();
        keep(jar, SetCookie::parse(&format!("{name}={value}")));
    }
}

pub(crate) fn code_in(page: &Url) -> String {
    parameter(page, "code").unwrap_or_else(|| panic!("{page}"))
}

pub(crate) fn ours(path: &str) -> Url {
    Url::parse(&format!("{ORIGIN}{path}")).unwrap()
}

fn is_page(url: &Url) -> bool {
    url.as_str().starts_with(&format!("{ORIGIN}/callback?"))
}

pub(crate) fn parameter(url: &Url, name: &str) -> Option<String> {
    url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
}

pub(crate) fn with_parameter(url: &Url, name: &str, value: Option<&str>) -> Url {
    let kept: Vec<_> = url.query_pairs().filter(|(key, _)| key != name).collect();
    let mut changed = url.clone();
    changed.query_pairs_mut().clear().extend_pairs(kept).extend_pairs(value.map(|value| (name, value)));
    changed
}

pub(crate) struct SetCookie {
    pub(crate) name: String,
    pub(crate) value: String,
    path: String,
    max_age: Option<i64>,
    pub(crate) text: String,
}

impl SetCookie {
    fn parse(text: &str) -> Self {
        let mut parts = text.split("; ");
        let (name, value) = parts.next().unwrap().split_once('=').unwrap();
        let attributes: HashMap<String, &str> =
            parts.filter_map(|part| part.split_once('=')).map(|(k, v)| (k.to_lowercase(), v)).collect();
        Self {
            name: name.into(),
            value: value.into(),
            path: attributes.get("path").unwrap_or(&"/").to_string(),
            max_age: attributes.get("max-age").map(|age| age.parse().unwrap()),
            text: text.into(),
        }
    }
}

pub(crate) fn set_cookies(answer: &Answer) -> Vec<SetCookie> {
    let values = answer.headers.get_all("set-cookie").iter();
    values.map(|value| SetCookie::parse(value.to_str().unwrap())).collect()
}

#[derive(Clone)]
pub(crate) enum Say {
    Json(u16, Value),
    /// Status, content type, body.
    Raw(u16, &'static str, Vec<u8>),
    Redirect(String),
    /// Reads the request and never answers.
    Nothing,
    HangUp,
}

pub(crate) struct Fake {
    pub(crate) url: String,
    said: Arc<Mutex<Said>>,
    task: JoinHandle<()>,
}

/// Its answers by path, and the paths that were requested.
#[derive(Default)]
struct Said {
    answers: HashMap<String, Say>,
    requests: Vec<String>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fake {
    pub(crate) async fn start() -> Self {
        Self::start_at("http", |socket| std::future::ready(Some(socket))).await
    }

    /// Behind TLS; returns its certificate as PEM.
    pub(crate) async fn start_with_tls() -> (Self, String) {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let accept = move |socket| {
            let accepted = acceptor.accept(socket);
            async move { accepted.await.ok() }
        };
        let fake = Self::start_at("https", accept).await;
        (fake, made.cert.pem())
    }

    async fn start_at<S, F>(scheme: &str, accept: impl Fn(TcpStream) -> F + Clone + Send + 'static) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send,
        F: Future<Output = Option<S>> + Send,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("{scheme}://{}", listener.local_addr().unwrap());
        let said: Arc<Mutex<Said>> = Arc::default();
        let task = tokio::spawn({
            let said = said.clone();
            async move {
                while let Ok((socket, _)) = listener.accept().await {
                    let (accept, said) = (accept.clone(), said.clone());
                    tokio::spawn(async move {
                        if let Some(socket) = accept(socket).await {
                            answer(socket, &said).await;
                        }
                    });
                }
            }
        });
        let fake = Self { url, said, task };
        fake.is_well();
        fake
    }

    pub(crate) fn say(&self, path: &str, say: Say) {
        self.said.lock().unwrap().answers.insert(path.into(), say);
    }

    /// Every answer is valid; every login is account 1, `sam`.
    pub(crate) fn is_well(&self) {
        self.say(DISCOVERY, Say::Json(200, self.discovery()));
        let token = Say::Json(200, json!({ "access_token": "a secret", "token_type": "Bearer" }));
        self.say("/token", token.clone());
        self.say("/login/oauth/access_token", token);
        self.say("/me", Say::Json(200, json!({ "sub": "1", "preferred_username": "sam" })));
        self.say("/user", Say::Json(200, json!({ "id": 1, "login": "sam", "avatar_url": null })));
    }

    pub(crate) fn discovery(&self) -> Value {
        let at = |path: &str| format!("{}{path}", self.url);
        json!({
            "issuer": self.url,
            "authorization_endpoint": at("/auth"),
            "token_endpoint": at("/token"),
            "userinfo_endpoint": at("/me"),
        })
    }

    pub(crate) fn forget(&self) {
        self.said.lock().unwrap().requests.clear();
    }

    pub(crate) fn requests(&self, path: &str) -> usize {
        self.said.lock().unwrap().requests.iter().filter(|requested| *requested == path).count()
    }

    /// In a browser of its own.
    pub(crate) async fn sign_in(&self, app: &impl AsRef<str>, provider: &str) -> Url {
        LoginBrowser::default().sign_in_at_fake(app, provider).await
    }
}

/// Begins a login; returns the URL of the callback.
pub(crate) async fn begin(app: &impl AsRef<str>, provider: &str, browser: &mut LoginBrowser) -> Url {
    let start = ours(&format!("/api/oauth/{provider}"));
    let authorize = browser.follow(app, start, |url| !url.as_str().starts_with(ORIGIN)).await;
    if is_page(&authorize) {
        return authorize;
    }
    let state = parameter(&authorize, "state").unwrap();
    let query = form_urlencoded::Serializer::new(String::new())
        .append_pair("code", "a-code-from-elsewhere")
        .append_pair("state", &state)
        .finish();
    ours(&format!("/api/oauth/{provider}/callback?{query}"))
}

async fn answer(mut socket: impl AsyncRead + AsyncWrite + Unpin, said: &Mutex<Said>) {
    let mut request = Vec::new();
    // Bodies are small and arrive with their heads.
    while !request.windows(4).any(|four| four == b"\r\n\r\n") {
        match socket.read_buf(&mut request).await {
            Ok(read) if read > 0 => {}
            _ => return,
        }
    }
    let head = String::from_utf8_lossy(&request).into_owned();
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let say = {
        let mut said = said.lock().unwrap();
        said.requests.push(path.clone());
        said.answers.get(&path).cloned()
    };
    let (status, headers, body) = match say {
        Some(Say::Json(status, value)) => {
            (status, "content-type: application/json".to_owned(), value.to_string().into_bytes())
        }
        Some(Say::Raw(status, form, body)) => (status, format!("content-type: {form}"), body),
        Some(Say::Redirect(to)) => (302, format!("location: {to}"), Vec::new()),
        Some(Say::Nothing) => return std::future::pending().await,
        Some(Say::HangUp) => return,
        None => (404, "x: y".into(), Vec::new()),
    };
    let head = format!(
        "HTTP/1.1 {status} X\r\n{headers}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let _ = socket.write_all(head.as_bytes()).await;
    let _ = socket.write_all(&body).await;
    // Unread input would turn the answer into a reset.
    let _ = socket.shutdown().await;
    let drain = async { while socket.read(&mut [0; 4096]).await.is_ok_and(|read| read > 0) {} };
    let _ = tokio::time::timeout(Duration::from_secs(1), drain).await;
}

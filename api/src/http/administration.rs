//! What the back end of a product does with a user at that person's request: erase them, export their data.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, StatusCode, header};
use protocol::ids::{ConversationId, SessionId, UserId};
use tokio::sync::mpsc;
use tracing::Instrument;
use warp::{Reply, reply::Response};

use super::{
    Api, HandlerResult,
    auth::ServiceCaller,
    empty,
    error::ApiError,
    request::{Inbound, NoBody},
};
use crate::{
    commands::erase_user::erase_user,
    domain::export::ExportedLine,
    store::{Database, StoreError, export},
};

const NDJSON: HeaderValue = HeaderValue::from_static("application/x-ndjson");

pub(super) fn user(inbound: &Inbound, _: NoBody) -> Result<UserId, ApiError> {
    inbound.id().ok_or(ApiError::NO_USER)
}

pub(super) async fn erase(api: Arc<Api>, caller: ServiceCaller, user: UserId) -> HandlerResult {
    if erase_user(&api.context, user, caller.context).await? {
        Ok(empty(StatusCode::NO_CONTENT))
    } else {
        Err(ApiError::NO_USER)
    }
}

/// One page of lines waits for the client at a time. After a failure the body breaks off, so that it is not taken for the whole.
#[expect(clippy::disallowed_methods, reason = "it ends with the answer that it fills")]
pub(super) async fn export(api: Arc<Api>, caller: ServiceCaller, user: UserId) -> HandlerResult {
    let database = api.context.database.clone();
    let first = database.run(async |connection| export::user(connection, user).await).await?;
    if first.is_empty() {
        return Err(ApiError::NO_USER);
    }
    tracing::info!(user.id = %user, service = caller.service.name, "exporting a user's data");
    let (pages, mut waiting) = mpsc::channel(1);
    let work = async move {
        if let Err(error) = write(&database, user, first, &Pages(pages.clone())).await {
            tracing::warn!(%error, user.id = %user, "the export of a user's data broke off");
            let _ = pages.send(Err(error)).await;
        }
    };
    tokio::spawn(work.in_current_span());
    let body = stream::poll_fn(move |context| waiting.poll_recv(context));
    let mut response: Response = warp::reply::stream(body).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, NDJSON);
    Ok(response)
}

struct Pages(mpsc::Sender<Result<Bytes, StoreError>>);

impl Pages {
    /// `false`: the client has gone.
    async fn send(&self, lines: &[ExportedLine]) -> bool {
        let mut page = Vec::new();
        for line in lines {
            serde_json::to_writer(&mut page, line).expect("a line is strings, numbers and times");
            page.push(b'\n');
        }
        page.is_empty() || self.0.send(Ok(page.into())).await.is_ok()
    }
}

async fn write(
    database: &Database,
    user: UserId,
    first: Vec<ExportedLine>,
    pages: &Pages,
) -> Result<(), StoreError> {
    if !pages.send(&first).await {
        return Ok(());
    }
    let mut after = Some(SessionId(0));
    while let Some(session) = after {
        let page = async |connection: &mut _| export::sessions(connection, user, session).await;
        let (lines, next) = database.run(page).await?;
        if !pages.send(&lines).await {
            return Ok(());
        }
        after = next;
    }
    let mut after = Some(UserId(0));
    while let Some(blocked) = after {
        let page = async |connection: &mut _| export::blocks(connection, user, blocked).await;
        let (lines, next) = database.run(page).await?;
        if !pages.send(&lines).await {
            return Ok(());
        }
        after = next;
    }
    let mut last = ConversationId(0);
    loop {
        let next = async |connection: &mut _| export::conversation(connection, user, last).await;
        let Some((conversation, line)) = database.run(next).await? else { break };
        if !pages.send(&[line]).await {
            return Ok(());
        }
        last = conversation;
        let mut after = Some(0);
        while let Some(number) = after {
            let page =
                async |connection: &mut _| export::messages(connection, user, conversation, number).await;
            let (lines, next) = database.run(page).await?;
            if !pages.send(&lines).await {
                return Ok(());
            }
            after = next;
        }
    }
    // Erased meanwhile: the last line is missing.
    let still = database.run(async |connection| export::user(connection, user).await).await?;
    if !still.is_empty() {
        pages.send(&[ExportedLine::End]).await;
    }
    Ok(())
}

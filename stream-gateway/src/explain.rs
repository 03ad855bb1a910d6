//! The route that explains what this gateway did with one event of one user, for an operator.

use http::StatusCode;
use service_kit::explain::{ExplainError, ExplainRequest, RequestedEvent};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Duration, timeout},
};

use crate::engine::{EngineCommand, Explanation};

/// For the delivery thread's answer.
const TIMEOUT: Duration = Duration::from_secs(5);

pub async fn explain(
    engine: &mpsc::Sender<EngineCommand>,
    request: ExplainRequest,
) -> Result<Explanation, ExplainError> {
    let ExplainRequest { user, event } = request;
    let RequestedEvent::Seq(seq) = event else {
        let sentence = "A gateway knows events by seq; ask api for the seq of a message's event";
        return Err(ExplainError(StatusCode::BAD_REQUEST, sentence.into()));
    };
    let (answer, answered) = oneshot::channel();
    let explanation = async {
        engine.send(EngineCommand::Explain { user, seq, answer }).await.ok()?;
        answered.await.ok()
    };
    let busy = || {
        ExplainError(StatusCode::SERVICE_UNAVAILABLE, "The delivery thread does not answer; try again".into())
    };
    timeout(TIMEOUT, explanation).await.ok().flatten().ok_or_else(busy)
}

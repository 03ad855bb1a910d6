//! Events that other back ends publish: in our own form, or as cloud events (`CloudEvents` 1.x) in structured mode, one or a batch.

use std::{collections::HashSet, sync::Arc};

use http::{StatusCode, header};
use serde::{Deserialize, Deserializer, Serialize, de::IgnoredAny};
use serde_json::value::RawValue;
use service_kit::quality_values::essence;

use super::{
    Api, HandlerResult,
    auth::ServiceCaller,
    error::ApiError,
    json,
    request::{FromBody, Inbound, JsonObject},
};
use crate::{
    commands::publish_events::publish_events,
    domain::published::{
        BadEventData, BadSourceOrId, EventData, EventKey, EventName, MOST_RECEIVERS, Published, Receiver,
    },
};

pub(super) const LARGEST_BODY: usize = 1024 * 1024;

const ONE: &str = "application/cloudevents+json";
const BATCH: &str = "application/cloudevents-batch+json";
/// Tells binary mode.
const SPEC_VERSION: &str = "ce-specversion";

/// In one of the three forms.
pub(super) enum Publication {
    Own(Vec<EventBody>),
    CloudEvents(Vec<CloudEvent>),
}

#[derive(Deserialize)]
struct OwnBody {
    events: Vec<JsonObject<EventBody>>,
}

#[derive(Deserialize)]
pub(super) struct EventBody {
    to: Vec<JsonObject<ReceiverBody>>,
    event: Option<String>,
    data: Option<Box<RawValue>>,
    key: Option<String>,
    ephemeral: Option<bool>,
}

/// One of these. `null` counts as an empty one.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReceiverForms {
    #[serde(default, deserialize_with = "given")]
    user_id: Option<String>,
    #[serde(default, deserialize_with = "given")]
    subject: Option<String>,
    #[serde(default, deserialize_with = "given")]
    username: Option<String>,
}

#[derive(Deserialize)]
#[serde(try_from = "ReceiverForms")]
struct ReceiverBody(Receiver);

impl TryFrom<ReceiverForms> for ReceiverBody {
    type Error = &'static str;

    fn try_from(forms: ReceiverForms) -> Result<Self, Self::Error> {
        match forms {
            ReceiverForms { user_id: Some(id), subject: None, username: None } => {
                Ok(Self(Receiver::UserId(id)))
            }
            ReceiverForms { user_id: None, subject: Some(subject), username: None } => {
                Ok(Self(Receiver::Subject(subject)))
            }
            ReceiverForms { user_id: None, subject: None, username: Some(name) } => {
                Ok(Self(Receiver::Username(name)))
            }
            _ => Err("a receiver is one of userId, subject, username"),
        }
    }
}

fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(Some(Option::deserialize(deserializer)?.unwrap_or_default()))
}

#[derive(Deserialize)]
pub(super) struct CloudEvent {
    specversion: Option<String>,
    id: Option<String>,
    source: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    subject: Option<String>,
    data: Option<Box<RawValue>>,
    data_base64: Option<IgnoredAny>,
}

impl FromBody for Publication {
    fn require(inbound: &Inbound) -> Result<(), ApiError> {
        let is_binary = inbound.headers.contains_key(SPEC_VERSION);
        if is_binary || matches!(form(inbound).as_str(), ONE | BATCH) {
            Ok(())
        } else {
            inbound.require_json()
        }
    }

    async fn read(inbound: &mut Inbound) -> Result<Self, ApiError> {
        let form = form(inbound);
        if matches!(form.as_str(), ONE | BATCH) {
            let text = inbound.text().await?;
            let events: Vec<JsonObject<CloudEvent>> =
                if form == ONE { vec![Inbound::parse(&text)?] } else { Inbound::parse(&text)? };
            return Ok(Self::CloudEvents(events.into_iter().map(|event| event.0).collect()));
        }
        if inbound.headers.contains_key(SPEC_VERSION) {
            let sentence = "CloudEvents are accepted in structured mode only: application/cloudevents+json";
            return Err(ApiError::BadBody(sentence.into()));
        }
        let text = inbound.text().await?;
        let JsonObject(OwnBody { events }) = Inbound::parse(&text)?;
        Ok(Self::Own(events.into_iter().map(|event| event.0).collect()))
    }
}

fn form(inbound: &Inbound) -> String {
    let value = inbound.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    essence(value.unwrap_or_default()).to_ascii_lowercase()
}

pub(super) fn published(_: &Inbound, publication: Publication) -> Result<Vec<Published>, ApiError> {
    let all = match publication {
        Publication::Own(events) => each(events, EventBody::published)?,
        Publication::CloudEvents(events) => each(events, CloudEvent::published)?,
    };
    if all.iter().map(|event| event.to.len()).sum::<usize>() > MOST_RECEIVERS {
        return Err(ApiError::unacceptable(
            "events",
            format!("Too many receivers in one request. {MOST_RECEIVERS} max"),
        ));
    }
    Ok(all)
}

/// The sentence about one of several says which.
fn each<T>(
    events: Vec<T>,
    read: impl Fn(T) -> Result<Published, ApiError>,
) -> Result<Vec<Published>, ApiError> {
    let count = events.len();
    let read = |(nth, event): (usize, T)| {
        read(event).map_err(|error| match error {
            ApiError::Unacceptable(field, sentence) if count > 1 => {
                ApiError::unacceptable(field, format!("Event {} of {count}: {sentence}", nth + 1))
            }
            ApiError::BadBody(sentence) if count > 1 => {
                ApiError::BadBody(format!("Event {} of {count}: {sentence}", nth + 1))
            }
            error => error,
        })
    };
    events.into_iter().enumerate().map(read).collect()
}

fn checked<T, E: ToString>(field: &'static str, result: Result<T, E>) -> Result<T, ApiError> {
    result.map_err(|error| ApiError::unacceptable(field, error.to_string()))
}

fn data_of(data: Option<Box<RawValue>>) -> Result<EventData, ApiError> {
    let Some(data) = data else { return Ok(EventData::null()) };
    EventData::new(data.get()).map_err(|error| match error {
        BadEventData::LoneSurrogate => ApiError::BadBody(error.to_string()),
        BadEventData::Nul | BadEventData::TooLong => ApiError::unacceptable("data", error.to_string()),
    })
}

impl EventBody {
    fn published(self) -> Result<Published, ApiError> {
        let Self { to, event, data, key, ephemeral } = self;
        let (mut seen, is_ephemeral) = (HashSet::new(), ephemeral.unwrap_or(false));
        let to: Vec<Receiver> =
            to.into_iter().map(|receiver| receiver.0.0).filter(|to| seen.insert(to.clone())).collect();
        let data = data_of(data)?;
        let name = checked("event", EventName::parse(event.as_deref().unwrap_or_default()))?;
        checked("to", to.iter().try_for_each(Receiver::check))?;
        let key = checked("key", key.as_deref().map(EventKey::parse).transpose())?;
        if is_ephemeral && key.is_some() {
            return Err(ApiError::unacceptable("key", "An ephemeral event has no key"));
        }
        Ok(Published { to, name, data, key, is_ephemeral })
    }
}

impl CloudEvent {
    fn published(self) -> Result<Published, ApiError> {
        let Self { specversion, id, source, kind, subject, data, data_base64 } = self;
        let data = data_of(data)?;
        let version = specversion.as_deref().unwrap_or_default().strip_prefix("1.");
        if !version.is_some_and(|minor| !minor.is_empty() && minor.bytes().all(|byte| byte.is_ascii_digit()))
        {
            return Err(ApiError::unacceptable("specversion", "The specversion of a CloudEvent must be 1.x"));
        }
        if data_base64.is_some() {
            return Err(ApiError::unacceptable(
                "data_base64",
                "Data in base64 is not accepted; send JSON as data",
            ));
        }
        let (id, source) = (id.unwrap_or_default(), source.unwrap_or_default());
        let key = EventKey::of_cloud_event(&source, &id).map_err(|error| {
            let field = if error == BadSourceOrId::Source { "source" } else { "id" };
            ApiError::unacceptable(field, error.to_string())
        })?;
        let name = checked("type", EventName::parse(kind.as_deref().unwrap_or_default()))?;
        let to = Receiver::Subject(subject.unwrap_or_default());
        checked("subject", to.check())?;
        if to == Receiver::Subject(String::new()) {
            return Err(ApiError::unacceptable("subject", "Subject required: the receiver's"));
        }
        Ok(Published { to: vec![to], name, data, key: Some(key), is_ephemeral: false })
    }
}

#[derive(Serialize)]
struct Results {
    results: Vec<EventResult>,
}

#[derive(Serialize)]
struct EventResult {
    published: usize,
    unknown: Vec<Receiver>,
}

pub(super) async fn publish(api: Arc<Api>, caller: ServiceCaller, events: Vec<Published>) -> HandlerResult {
    let issuer = api.external_issuer.clone();
    let outcomes = publish_events(&api.context, events, issuer, caller.context).await?;
    let results = outcomes
        .into_iter()
        .map(|outcome| EventResult { published: outcome.receivers.len(), unknown: outcome.unknown });
    Ok(json(StatusCode::OK, &Results { results: results.collect() }))
}

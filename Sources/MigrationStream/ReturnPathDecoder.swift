/// Decodes what the destination says, by being asked like ``StreamDecoder``.
public struct ReturnPathDecoder: Sendable {
    /// Bytes decoded so far.
    public private(set) var position: UInt64 = 0
    /// Bytes to take by the caller before the next message: a bitmap (``PostcopyMessage/receivedBitmap(block:byteCount:)``).
    public internal(set) var payloadBytes = 0
    private var failure: StreamError?
    /// Of which pages may be requested; empty: postcopy's messages are errors.
    let blocks: [RAMBlockDescription]
    let blockNames: [[UInt8]]
    /// The block of the last request.
    var requestedBlock: Int?
    /// The block whose bitmap is being taken, or was just taken.
    var bitmapBlock: Int?

    /// - Parameter blocks: of which the destination may request pages, if there is postcopy.
    public init(postcopyOf blocks: [RAMBlockDescription] = []) {
        self.blocks = blocks
        blockNames = blocks.map { Array($0.name.utf8) }
    }

    /// The caller took that many of the payload's bytes.
    public mutating func payloadConsumed(_ count: Int) {
        precondition(count >= 0 && count <= payloadBytes, "ReturnPathDecoder: more payload consumed than there is")
        payloadBytes -= count
        position += UInt64(count)
    }

    func error(_ cause: StreamError.Cause) -> StreamError { StreamError(cause, position: position) }

    mutating func advance(_ count: Int, in buffer: inout ReceiveBuffer) {
        buffer.consume(count)
        position += UInt64(count)
    }

    /// The next message, or nil when `buffer` does not hold a whole one. The first error is final.
    public mutating func next(from buffer: inout ReceiveBuffer) throws(StreamError) -> ReturnPathMessage? {
        precondition(payloadBytes == 0, "ReturnPathDecoder: payload was not taken")
        if let failure { throw failure }
        do throws(StreamError) {
            if let bitmapBlock { return try bitmapEnd(bitmapBlock, &buffer).map { .postcopy($0) } }
            guard buffer.count >= 4 else { return nil }
            let number = buffer.be16(0)
            let length = Int(buffer.be16(2))
            guard let type = ReturnPathType(rawValue: number), type != .invalid else {
                throw StreamError(.unknownMessage(number), position: position)
            }
            guard length <= StreamLimit.reasonBytes else {
                throw StreamError(.messageLength(type.name, got: length), position: position)
            }
            guard buffer.count >= 4 + length else { return nil }
            if type.belongsToPostcopy, !blocks.isEmpty {
                return try postcopyMessage(type, length, &buffer).map { .postcopy($0) }
            }
            guard let message = try parse(type, length, buffer) else {
                throw StreamError(.messageLength(type.name, got: length), position: position)
            }
            advance(4 + length, in: &buffer)
            return message
        } catch {
            failure = error
            throw error
        }
    }

    /// - Returns: nil when the length does not fit.
    private func parse(
        _ type: ReturnPathType, _ length: Int, _ buffer: ReceiveBuffer
    ) throws(StreamError) -> ReturnPathMessage? {
        switch type {
        case .shut: return length == 4 ? .shut(buffer.be32(4)) : nil
        case .pong: return length == 4 ? .pong(buffer.be32(4)) : nil
        case .hello:
            guard length == 28 else { return nil }
            return .hello(
                version: buffer.be32(4), features: FeatureSet(rawValue: buffer.be64(8)),
                instance: buffer.identifier(16))
        case .ready: return length == 8 ? .ready(nanoseconds: buffer.be64(4)) : nil
        case .started: return length == 8 ? .started(nanoseconds: buffer.be64(4)) : nil
        case .failure:
            guard let reason = buffer.text(4..<(4 + length)) else {
                throw StreamError(.reasonNotText(type.name), position: position)
            }
            return .failure(reason: reason)
        case .verdict:
            guard length == 1 else { return nil }
            guard let verdict = Verdict(rawValue: buffer[4]), verdict != .invalid else {
                throw StreamError(.unknownVerdict(buffer[4]), position: position)
            }
            return .verdict(verdict)
        case .retracted: return length == 4 ? .retracted(attempt: buffer.be32(4)) : nil
        case .resumed: return length == 0 ? .resumed : nil
        case .digestsWanted:
            return length == DigestRange.byteCount ? buffer.digestRange(4).map { .digestsWanted($0) } : nil
        case .switchoverAcknowledged: return length == 0 ? .switchoverAcknowledged : nil
        case .invalid, .requestPagesWithName, .requestPages, .receivedBitmap, .resumeAcknowledged:
            throw StreamError(.unsupportedMessage(type.name), position: position)
        }
    }
}

extension ReceiveBuffer {
    /// `nil`: its level or its count is impossible.
    func digestRange(_ index: Int) -> DigestRange? {
        guard let level = DigestLevel(rawValue: self[index]), level != .invalid else { return nil }
        let range = DigestRange(
            level: level, block: be32(index + 1), first: be64(index + 5), count: be32(index + 13))
        return range.count <= StreamLimit.digests ? range : nil
    }
}

extension ReturnPathType {
    var belongsToPostcopy: Bool {
        switch self {
        case .requestPages, .requestPagesWithName, .receivedBitmap, .resumeAcknowledged: true
        default: false
        }
    }

    /// The name in documentation and error sentences.
    public var name: String {
        switch self {
        case .invalid: "INVALID"
        case .shut: "SHUT"
        case .pong: "PONG"
        case .requestPagesWithName: "REQ_PAGES_ID"
        case .requestPages: "REQ_PAGES"
        case .receivedBitmap: "RECV_BITMAP"
        case .resumeAcknowledged: "RESUME_ACK"
        case .switchoverAcknowledged: "SWITCHOVER_ACK"
        case .hello: "HELLO"
        case .ready: "READY"
        case .started: "STARTED"
        case .failure: "FAILURE"
        case .verdict: "VERDICT"
        case .retracted: "RETRACTED"
        case .resumed: "RESUMED"
        case .digestsWanted: "DIGESTS_WANTED"
        }
    }
}

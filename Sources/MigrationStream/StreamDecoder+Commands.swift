extension StreamDecoder {
    mutating func command(_ buffer: inout ReceiveBuffer) throws(StreamError) -> Step {
        guard buffer.count >= 5 else { return .needMore }
        let number = buffer.be16(1)
        let length = Int(buffer.be16(3))
        let type = CommandType(rawValue: number)
        if !describes {
            guard let type, type != .invalid else { throw error(.unknownCommand(number)) }
            if type == .cancel, length > StreamLimit.reasonBytes {
                throw error(.commandLength(type.name, got: length))
            }
        }
        guard buffer.count >= 5 + length else { return .needMore }
        guard let parsed = try parse(type ?? .invalid, number, length, buffer) else {
            throw error(.commandLength((type ?? .invalid).name, got: length))
        }
        switch parsed {
        case .begin(_, let features), .resume(_, let features):
            if !describes { allowsPageBatches = features.contains(.pageBatches) }
            carriesDigests = features.contains(.verification)
            pagesAreUniform = true
        // The device sections before it may be void: those of the next attempt have the same numbers.
        case .retract, .commitWithin: forgetDeviceSections()
        // Who describes a stream reads on: the package's sections are like any others.
        case .postcopy(.advise(let advice?)): advisedPageSizes = advice.blockPageSizes
        case .postcopy(.packaged(let byteCount)) where !describes: payloadBytes = Int(byteCount)
        case .postcopy(.run) where isPackage: state = .ended
        default: break
        }
        advance(5 + length, in: &buffer)
        return .item(.command(parsed))
    }

    /// - Returns: nil when the length does not fit.
    private func digests(_ length: Int, _ buffer: ReceiveBuffer) -> ForwardCommand? {
        guard length >= DigestRange.byteCount, let range = buffer.digestRange(5),
            length == DigestRange.byteCount + 8 * Int(range.count)
        else { return nil }
        let start = 5 + DigestRange.byteCount
        return .digests(range, (0..<Int(range.count)).map { buffer.be64(start + 8 * $0) })
    }

    private mutating func forgetDeviceSections() {
        sections = sections.filter { $0.value.head.type != .full }
        seenSections = sections.count
    }

    /// - Returns: nil when the length does not fit.
    private func parse(
        _ type: CommandType, _ number: UInt16, _ length: Int, _ buffer: ReceiveBuffer
    ) throws(StreamError) -> ForwardCommand? {
        if isPackage, !type.mayBePackaged { throw error(.postcopy(.commandInPackage(type))) }
        switch type {
        case .openReturnPath: return length == 0 ? .openReturnPath : nil
        case .ping: return length == 4 ? .ping(buffer.be32(5)) : nil
        case .switchoverStart: return length == 0 ? .switchoverStart : nil
        case .begin:
            return length == 24 ? .begin(buffer.identifier(5), FeatureSet(rawValue: buffer.be64(21))) : nil
        case .prepare: return length == 0 ? .prepare : nil
        case .commit: return length == 0 ? .commit : nil
        case .commitWithin:
            return length == 12 ? .commitWithin(attempt: buffer.be32(5), nanoseconds: buffer.be64(9)) : nil
        case .retract: return length == 4 ? .retract(attempt: buffer.be32(5)) : nil
        case .root: return length == 8 ? .root(buffer.be64(5)) : nil
        case .digests: return digests(length, buffer)
        case .settle: return length == 16 ? .settle(buffer.identifier(5)) : nil
        case .resume:
            return length == 24 ? .resume(buffer.identifier(5), FeatureSet(rawValue: buffer.be64(21))) : nil
        case .cancel:
            guard let reason = buffer.text(5..<(5 + length)) else { throw error(.reasonNotText(type.name)) }
            return .cancel(reason: reason)
        case .postcopyAdvise, .postcopyListen, .postcopyRun, .postcopyRAMDiscard, .packaged, .postcopyResume,
            .receiveBitmap:
            guard describes || allowsPostcopy else { throw error(.unsupportedCommand(type.name)) }
            return try postcopyCommand(type, length, buffer).map { .postcopy($0) }
        case .invalid, .enableCOLO:
            guard describes else { throw error(.unsupportedCommand(type.name)) }
            return .other(type: number, length: length)
        }
    }
}

extension CommandType {
    /// Whether it has a place in a package.
    var mayBePackaged: Bool { self == .ping || self == .postcopyListen || self == .postcopyRun }

    /// The name in documentation and error sentences.
    public var name: String {
        switch self {
        case .invalid: "INVALID"
        case .openReturnPath: "OPEN_RETURN_PATH"
        case .ping: "PING"
        case .postcopyAdvise: "POSTCOPY_ADVISE"
        case .postcopyListen: "POSTCOPY_LISTEN"
        case .postcopyRun: "POSTCOPY_RUN"
        case .postcopyRAMDiscard: "POSTCOPY_RAM_DISCARD"
        case .packaged: "PACKAGED"
        case .enableCOLO: "ENABLE_COLO"
        case .postcopyResume: "POSTCOPY_RESUME"
        case .receiveBitmap: "RECV_BITMAP"
        case .switchoverStart: "SWITCHOVER_START"
        case .begin: "BEGIN"
        case .prepare: "PREPARE"
        case .commit: "COMMIT"
        case .settle: "SETTLE"
        case .cancel: "CANCEL"
        case .retract: "RETRACT"
        case .commitWithin: "COMMIT_WITHIN"
        case .resume: "RESUME"
        case .root: "ROOT"
        case .digests: "DIGESTS"
        }
    }
}

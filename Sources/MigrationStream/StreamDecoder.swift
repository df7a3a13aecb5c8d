/// Decodes a migration stream by being asked: ``next(from:)`` returns the next item, or nil when it needs more bytes.
///
/// Page contents go around it. After an item that announces payload, ``payloadBytes`` is not zero: the caller takes those
/// bytes, first from the buffer, then straight from its source into guest memory, tells ``payloadConsumed(_:)``, and goes
/// on. Everything the stream says is checked; the first ``StreamError`` is final.
public struct StreamDecoder: Sendable {
    /// What the items are for.
    public enum Purpose: Sendable {
        /// To load them: blocks and sections are known, and anything else is an error.
        case load(blocks: [RAMBlockDescription], catalogue: SectionCatalogue)
        /// To describe them: blocks are learned from the stream, and the bodies of sections the catalogue lacks are
        /// skipped by looking for their footer.
        case describe(catalogue: SectionCatalogue)
    }

    enum State: Equatable, Sendable {
        case header
        case betweenSections
        case configurationTail
        case ramBlockList
        case records
        case ramFooter
        case inference
        case trailer
        case ended
    }

    /// A section that was started and has not ended.
    struct OpenSection: Sendable {
        let head: SectionHead
        var ended: Bool
    }

    /// What one step came to.
    enum Step {
        case needMore
        case again
        case item(StreamItem)
    }

    let purpose: Purpose
    let catalogue: SectionCatalogue
    /// The blocks that items name by index.
    public internal(set) var blocks: [RAMBlockDescription]
    var blockNames: [[UInt8]]
    var blockLengths: [UInt64]

    /// Bytes of the stream decoded so far, payload included: where the next record begins.
    public internal(set) var position: UInt64 = 0
    /// Bytes to take by the caller before the next item.
    public internal(set) var payloadBytes = 0
    /// Set when no more bytes will come, before the last items are asked for. Only inferred sections care.
    public var inputHasEnded = false
    /// Whether EOS is an item of its own, ``StreamItem/ramRecordsEnded``.
    public var tellsEndOfRecords = false
    /// What ADVISE said of the source's page sizes: then blocks with pages of another size than the stream's tell it.
    var advisedPageSizes: UInt64?
    /// BEGIN was said: between two Godwits pages are the stream's own, whatever stands behind blocks.
    var pagesAreUniform = false
    /// The commands of postcopy are items instead of errors.
    public var allowsPostcopy = false

    /// Where the stream's first byte stands in its file: only `mappedBlock` cares.
    public var fileOffset: UInt64 = 0
    /// Pages stand at places of their own in the file: the stream's configuration said so.
    public internal(set) var isMapped = false

    /// What is decoded is a package, or the records of a channel for requested pages.
    var isPackage = false
    var hasRecordsOnly = false

    var state = State.header
    var failure: StreamError?
    var sections: [UInt32: OpenSection] = [:]
    var seenSections = 0
    var sectionID: UInt32 = 0
    var sectionType = SectionType.full
    var allowsPageBatches: Bool
    /// BEGIN chose ``FeatureSet/verification``: digests stand in the records of pages.
    var carriesDigests = false
    /// Of the pages that the last item brings as data, in their order; empty when they carry none.
    public internal(set) var digests: [UInt64] = []
    /// The block of the last page record, or -1.
    var currentBlock = -1
    var currentLength: UInt64 = 0
    /// The block list while it is read.
    var listRemaining: UInt64 = 0
    var listTotal: UInt64 = 0
    var listed: [RAMBlockDescription] = []
    /// The section whose footer is searched, and its bytes so far.
    var inferredHead: SectionHead?
    var inferredBytes: UInt64 = 0

    public init(_ purpose: Purpose) {
        self.purpose = purpose
        switch purpose {
        case .load(let blocks, let catalogue):
            self.blocks = blocks
            self.catalogue = catalogue
            allowsPageBatches = false
        case .describe(let catalogue):
            blocks = []
            self.catalogue = catalogue
            allowsPageBatches = true
        }
        blockNames = blocks.map { Array($0.name.utf8) }
        blockLengths = blocks.map(\.length)
    }

    var describes: Bool {
        if case .describe = purpose { true } else { false }
    }

    /// The next item, or nil when `buffer` does not hold a whole one.
    ///
    /// ``payloadBytes`` must be zero.
    public mutating func next(from buffer: inout ReceiveBuffer) throws(StreamError) -> StreamItem? {
        precondition(payloadBytes == 0, "StreamDecoder: payload was not taken")
        if let failure { throw failure }
        do throws(StreamError) {
            while true {
                if state == .records {
                    switch try record(&buffer) {
                    case .item(let item): return item
                    case .needMore: return nil
                    case .again: continue
                    }
                }
                switch try step(&buffer) {
                case .item(let item): return item
                case .needMore: return nil
                case .again: continue
                }
            }
        } catch {
            failure = error
            throw error
        }
    }

    /// The caller took that many of the payload's bytes.
    public mutating func payloadConsumed(_ count: Int) {
        precondition(count >= 0 && count <= payloadBytes, "StreamDecoder: more payload consumed than there is")
        payloadBytes -= count
        position += UInt64(count)
    }

    /// Checks that the stream may end here: call it when the input ended and ``next(from:)`` returned nil.
    public func checkEnd(_ buffer: ReceiveBuffer) throws(StreamError) {
        if let failure { throw failure }
        if payloadBytes > 0 { throw StreamError(.truncated(inside: "page contents"), position: position) }
        let inside =
            switch state {
            case .header: "its header"
            case .betweenSections where isPackage: "a package"
            case .betweenSections, .configurationTail: buffer.isEmpty ? "the list of sections" : "a section"
            case .ramBlockList: "the list of RAM blocks"
            case .records: "the records of section '\(Wire.ramSectionName)'"
            case .ramFooter: "the footer of section '\(Wire.ramSectionName)'"
            case .inference: "section '\(inferredHead?.name ?? "")'"
            case .trailer, .ended: "the machine description"
            }
        if state == .ended || ((state == .trailer || hasRecordsOnly) && buffer.isEmpty) { return }
        throw StreamError(.truncated(inside: inside), position: position)
    }

    private mutating func step(_ buffer: inout ReceiveBuffer) throws(StreamError) -> Step {
        switch state {
        case .header: try header(&buffer)
        case .betweenSections: try section(&buffer)
        case .configurationTail: try configurationTail(&buffer)
        case .ramBlockList: try ramBlockList(&buffer)
        case .records: try record(&buffer)
        case .ramFooter: try ramFooter(&buffer)
        case .inference: try inference(&buffer)
        case .trailer: try trailer(&buffer)
        case .ended:
            if buffer.isEmpty { .needMore } else { throw error(.dataAfterEnd) }
        }
    }

    func error(_ cause: StreamError.Cause) -> StreamError { StreamError(cause, position: position) }

    mutating func advance(_ count: Int, in buffer: inout ReceiveBuffer) {
        buffer.consume(count)
        position += UInt64(count)
    }

    /// The text of a name, which must not be empty.
    func name(_ buffer: ReceiveBuffer, at index: Int, count: Int, of what: String) throws(StreamError) -> String {
        guard count > 0 else { throw error(.emptyName(what: what)) }
        guard let text = buffer.text(index..<(index + count)) else { throw error(.nameNotText(what: what)) }
        return text
    }

    /// Whether a connection that begins so brings a stream.
    public static func isAnnounced(by bytes: [UInt8]) -> Bool { bytes.count >= 4 && bytes.be32(0) == Wire.magic }

    private mutating func header(_ buffer: inout ReceiveBuffer) throws(StreamError) -> Step {
        guard buffer.count >= 4 else { return .needMore }
        guard buffer.be32(0) == Wire.magic else { throw error(.notAStream(buffer.be32(0))) }
        guard buffer.count >= 8 else { return .needMore }
        guard buffer.be32(4) == Wire.version else { throw error(.streamVersion(buffer.be32(4))) }
        advance(8, in: &buffer)
        state = .betweenSections
        return .item(.header)
    }

    private mutating func trailer(_ buffer: inout ReceiveBuffer) throws(StreamError) -> Step {
        guard buffer.count >= 1 else { return .needMore }
        guard buffer[0] == SectionType.vmDescription.rawValue else { throw error(.dataAfterEnd) }
        guard buffer.count >= 5 else { return .needMore }
        let length = buffer.be32(1)
        guard length <= StreamLimit.vmDescriptionBytes else { throw error(.vmDescriptionTooLong(length)) }
        advance(5, in: &buffer)
        payloadBytes = Int(length)
        state = .ended
        return .item(.vmDescription(byteCount: Int(length)))
    }
}
